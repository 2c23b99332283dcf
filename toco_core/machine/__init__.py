"""What depends on the machine: devices, processes, files."""
