"""A network small enough to ship: `digits.pt`, the weights that `train_digits` trains for `models.digits_net`."""
