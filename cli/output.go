package cli

import (
	"bytes"
	"encoding/json"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

var outputs = []string{"table", "wide", "json", "yaml"}

// layout is how several messages of one command follow each other.
type layout int

const (
	_ layout = iota
	// single is a command that prints one message.
	single
	// stream is a command that prints many: JSON one a line, YAML as documents.
	stream
)

// structured prints message as JSON or YAML, and says false where neither is wanted.
func (c *command) structured(message proto.Message, layout layout) (bool, error) {
	if c.output != "json" && c.output != "yaml" {
		return false, nil
	}
	text, err := encode(message, c.output, layout)
	if err != nil {
		return true, &failure{status: exitFailed, what: "encoding the answer: " + err.Error()}
	}
	return true, c.print(text)
}

func encode(message proto.Message, output string, layout layout) (string, error) {
	text, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(message)
	if err != nil {
		return "", err
	}
	// protojson varies its spaces from build to build on purpose; scripts and golden files
	// shall not see that.
	var out bytes.Buffer
	switch {
	case output == "yaml":
		if layout == stream {
			out.WriteString("---\n")
		}
		text, err = yaml.JSONToYAML(text)
		out.Write(text)
		return out.String(), err
	case layout == stream:
		err = json.Compact(&out, text)
	default:
		err = json.Indent(&out, text, "", "  ")
	}
	out.WriteByte('\n')
	return out.String(), err
}
