"""`multilora cluster`: engines on several machines as one service, on Ray Serve."""
