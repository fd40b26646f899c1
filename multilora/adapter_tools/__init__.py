"""`multilora adapters`: examine one adapter without a server: what it is, and whether it does what PEFT says."""
