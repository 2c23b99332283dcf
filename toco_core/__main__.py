"""`python -m toco_core` and `torchrun -m toco_core`: see `launch`."""

from .train.launch import main

main()
