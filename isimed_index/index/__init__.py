"""Nearest rows: exact search, FAISS search whose recall is measured, and the two joined over live rows."""
