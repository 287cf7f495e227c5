"""One pipeline over few devices that may all be unlike: exact programmes over every stage there is."""
