"""From images to label maps, similarities and files."""
