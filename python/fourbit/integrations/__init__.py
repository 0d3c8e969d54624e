"""Other libraries: each module here touches one of them, and is imported only when it is used."""
