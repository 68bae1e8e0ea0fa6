"""What a KV cache sheds: key channels (ThinK) and entries of each token (Mustafar)."""
