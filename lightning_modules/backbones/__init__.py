"""The frozen pre-trained network: how it is built, filled with weights, and read at its layers."""
