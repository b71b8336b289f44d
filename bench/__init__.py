"""What the kernels promise besides being right: speed, machine code, traffic."""
