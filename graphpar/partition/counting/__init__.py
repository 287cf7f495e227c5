"""One pipeline of equal blocks over many devices: stages are counted, kind by kind."""
