"""Exchange: a store's content as plain files that other tools read, and such files back into a store.

export       snapshot ─▶ Parquet folder · NumPy folder · DuckDB file
restore      Parquet folder ─▶ store
foreign      embeddings of other programs, with a card ─▶ store
"""
