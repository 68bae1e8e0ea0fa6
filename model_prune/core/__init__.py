"""The parts that pruning methods are made of; none of them knows a method."""
