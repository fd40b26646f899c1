"""`multilora plan`: what a GPU would serve, where it breaks, which flag to set."""
