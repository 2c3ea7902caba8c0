"""Triton kernels of our own. Imported only where one runs (trainer/ops); each is proven in Triton's interpreter."""
