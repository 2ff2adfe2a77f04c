"""Where a store lies: a directory or a bucket; locks, claims, and what the operating system refuses."""
