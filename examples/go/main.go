// Streams one chat answer: treadle-chat [words ...]
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	inference "treadle-chat/treadle/api/inference/v1"
)

// bearer shows the key with every call, in plain text too, as on loopback.
type bearer string

func (key bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(key)}, nil
}

func (bearer) RequireTransportSecurity() bool { return false }

// options are TLS and the key, by the names that the suite's own programs use, and its keepalive.
func options() ([]grpc.DialOption, error) {
	transport := insecure.NewCredentials()
	if path := os.Getenv("TREADLE_TLS_CA"); path != "" {
		pem, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate", path)
		}
		transport = credentials.NewTLS(&tls.Config{RootCAs: roots})
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 60 * time.Second, Timeout: 20 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16 << 20)),
	}
	if key := os.Getenv("TREADLE_API_KEY"); key != "" {
		dial = append(dial, grpc.WithPerRPCCredentials(bearer(key)))
	}
	return dial, nil
}

func chat(address, question string) error {
	dial, err := options()
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(address, dial...)
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	temperature, most := float32(0), uint32(64)
	stream, err := inference.NewInferenceServiceClient(connection).GenerateStream(ctx, &inference.GenerateStreamRequest{
		Generation: &inference.Generation{
			Model: "smollm2",
			Prompt: &inference.Generation_Chat{Chat: &inference.Chat{
				Messages: []*inference.ChatMessage{{Role: "user", Content: question}},
			}},
			Sampling: &inference.SamplingParameters{Temperature: &temperature},
			Stopping: &inference.StoppingCriteria{MaxNewTokens: &most},
		},
	})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		switch chunk := response.Chunk.Chunk.(type) {
		case *inference.GenerateChunk_Started:
			fmt.Fprintf(os.Stderr, "[%s, %d tokens read]\n", chunk.Started.ArtifactDigest, chunk.Started.PromptTokens)
		case *inference.GenerateChunk_Tokens:
			fmt.Print(chunk.Tokens.Text)
		case *inference.GenerateChunk_Finished:
			fmt.Printf("\n%s, %d tokens made\n", chunk.Finished.Choices[0].FinishReason, chunk.Finished.Usage.OutputTokens)
		}
	}
}

// explain says what went wrong: the code, then the details that the suite sends along.
func explain(err error) string {
	known := status.Convert(err)
	lines := []string{fmt.Sprintf("%s: %s", known.Code(), known.Message())}
	for _, detail := range known.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			lines = append(lines, "reason "+detail.Reason)
		case *errdetails.BadRequest:
			for _, field := range detail.FieldViolations {
				lines = append(lines, field.Field+": "+field.Description)
			}
		case *errdetails.RetryInfo:
			lines = append(lines, "try again in "+detail.RetryDelay.AsDuration().String())
		}
	}
	return strings.Join(lines, "\n  ")
}

func main() {
	address := os.Getenv("TREADLE_ADDRESS")
	if address == "" {
		address = "127.0.0.1:50051"
	}
	question := strings.Join(os.Args[1:], " ")
	if question == "" {
		question = "What is a loom? Answer in one sentence."
	}
	if err := chat(address, question); err != nil {
		log.Fatal(explain(err))
	}
}
