"""The diff as text, Mermaid, DOT, Model Explorer JSON, SVG, PNG and HTML. Each renderer only reads the one data structure."""
