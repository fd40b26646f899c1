"""`multilora adapters convert`: from other writers' files to a directory as PEFT writes it."""
