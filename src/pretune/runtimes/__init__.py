"""Export to other runtimes: ExecuTorch, which runs on phones, and ONNX."""
