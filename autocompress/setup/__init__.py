"""From a task to what a search needs: model, data and device, loaded and found to fit together."""
