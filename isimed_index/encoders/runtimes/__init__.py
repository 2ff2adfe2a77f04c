"""What runs a network of ours: PyTorch itself, or a faster program on a graph exported from the same weights.

kind           the names, and which of them this machine has
exported       network ─▶ ONNX graph, once, kept in the user's cache
by_torch · by_openvino · by_onnxruntime       one runtime each: (n, 1, x, y, z) ─▶ {output: (n, d, i, j, k)}
transfer       arrays to a GPU and back, while it computes
exact          float32 on a GPU without TF32
ahead          passes in a row, each begun before the one before it is waited for
checked        the first batch is compared with PyTorch
trial          which one is the fastest on this machine
"""
