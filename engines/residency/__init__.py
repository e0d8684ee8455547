"""Which engines are loaded when, and how much memory they take."""
