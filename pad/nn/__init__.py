"""Networks, as modules and as functions of one flat parameter vector."""
