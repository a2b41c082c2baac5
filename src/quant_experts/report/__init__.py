"""What a comparison of methods shows to a reader: a web page, a terminal table, a JSON file."""
