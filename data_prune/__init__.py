"""What a training set sheds: rows that teach little. Empty until its first method lands."""
