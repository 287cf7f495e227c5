"""Models and scripts that show graphpar at work; installed as `graphpar.examples`."""
