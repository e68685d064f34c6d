"""One model on several ranks: who they are, how they talk, and the executor that leads them. Data plane."""
