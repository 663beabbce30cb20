"""ROOM 3: score table → numbers, tables, plots. numpy, scikit-learn, matplotlib and zarr; never torch.

Write `from eval.czsl import evaluate`, never `import eval`: that would rebind Python's built-in.
"""
