"""Studies of a trained model: labels, crops, layers, a second stage."""
