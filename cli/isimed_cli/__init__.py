"""The `isimed` command line: it parses, calls one library function, and renders what comes back."""
