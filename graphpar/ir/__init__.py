"""The intermediate representation: one immutable graph type at three levels."""
