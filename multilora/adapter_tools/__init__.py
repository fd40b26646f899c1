"""`multilora adapters`: one adapter, looked at without a server: what it is, and whether it does what PEFT says."""
