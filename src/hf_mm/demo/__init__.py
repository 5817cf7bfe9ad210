"""The demo: a Gradio page over a pipeline of either family, and a Space folder that shows it."""
