"""Models as files for other runtimes: ExecuTorch, which runs on phones, and ONNX."""
