"""What a person looks at: pictures, figures, tables."""
