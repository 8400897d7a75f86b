"""Models and devices for tests: of this project and of those who extend it."""
