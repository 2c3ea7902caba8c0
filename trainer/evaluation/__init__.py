"""Benchmarks of a trained model: lm-evaluation-harness on our own model, and LogicKor with a judge."""
