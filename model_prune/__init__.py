"""What a network sheds: weights that do little. Empty until its first method lands."""
