"""What is done to a row: pure functions on values, and thin batch callables. Never imports ray."""
