"""One module per method: `UNITS`, unit name -> function of a case."""
