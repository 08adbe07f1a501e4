"""What a pretrained model is taught: behaviours, as conversations built by code."""
