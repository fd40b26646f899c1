"""`multilora completion`: the script that makes a shell complete the command line."""
