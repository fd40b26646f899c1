"""`multilora doctor`: what is installed, what this machine can do, and what will be slow here and why."""
