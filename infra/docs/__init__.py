"""What the site of docs/ needs beside its pages: the reference from the code, and a diagram."""
