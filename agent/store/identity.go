package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
)

// identity is what this member remembers of its mesh's store between two lives. It is
// kept outside etcd's data directory, to notice when that was lost.
type identity struct {
	ID       string `json:"id"`       // of the mesh; empty: never joined one
	Revision int64  `json:"revision"` // highest revision seen, some seconds behind
}

const identityEvery = 10 * time.Second

func identityFile(dataDir string) string { return filepath.Join(dataDir, "identity") }

func loadIdentity(dataDir string) (identity, error) {
	var id identity
	b, err := os.ReadFile(identityFile(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return id, nil
	}
	if err != nil {
		return id, fmt.Errorf("reading the mesh's identity: %w", err)
	}
	if err := json.Unmarshal(b, &id); err != nil || id.ID == "" {
		return id, fmt.Errorf("reading the mesh's identity: %s is damaged; delete it to accept the store as it is", identityFile(dataDir))
	}
	return id, nil
}

func (id identity) save(dataDir string) error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dataDir, 0o700); err != nil {
		return fmt.Errorf("saving the mesh's identity: %w", err)
	}
	if err := renameio.WriteFile(identityFile(dataDir), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("saving the mesh's identity: %w", err)
	}
	return nil
}

func (s *Store) identity() identity {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known
}

// recognise compares an answer of the store with what is known of it. least is the
// highest revision seen before the question was asked.
func (s *Store) recognise(id string, revision, least int64) error {
	known := s.identity()
	const remedy = "check where the store points; to accept it as it is, delete %s and restart the agent"
	file := identityFile(s.cfg.DataDir)
	switch {
	case id == "":
		return fmt.Errorf("%w: it has no identity any more, known is %s: "+remedy, ErrForeignStore, known.ID, file)
	case id != known.ID:
		return fmt.Errorf("%w: its identity is %s, known is %s: "+remedy, ErrForeignStore, id, known.ID, file)
	case revision < least:
		return fmt.Errorf("%w: its revision %d is lower than %d, seen earlier: "+remedy, ErrForeignStore, revision, least, file)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known.Revision = max(s.known.Revision, revision)
	return nil
}

// keepIdentity saves the highest revision seen. It has its own goroutine, since a disk
// may take its time.
func (s *Store) keepIdentity(ctx context.Context) error {
	tick := time.NewTicker(identityEvery)
	defer tick.Stop()
	saved := s.identity()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := s.identity()
		if now == saved {
			continue
		}
		if err := now.save(s.cfg.DataDir); err != nil {
			s.log.Warn("mesh identity not saved", "error", err)
			continue
		}
		saved = now
	}
}
