"""Training on several ranks against plain `keras.Model.fit` in one process: the same weights, the same history."""
