"""One file for each kind of input; a function in it that is marked with `generator` makes cases."""
