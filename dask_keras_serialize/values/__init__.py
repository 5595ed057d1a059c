"""Objects by value: through pickle, as the graph of all they hold."""
