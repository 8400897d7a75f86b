"""Make a student of a network by a policy, and train it: channels, blocks, ranks, bits, reconstruction, distillation."""
