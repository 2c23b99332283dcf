"""`python -m toco_core` and `torchrun -m toco_core`: see `launch`."""

from .launch import main

main()
