"""What goes over the wire: the header, the frames, and who can read them. No Keras here."""
