"""A table: the Wisconsin breast cancer measurements as CSV files, a multilayer perceptron."""
